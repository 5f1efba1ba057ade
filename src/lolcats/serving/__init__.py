"""Text for many prompts at once, in this process and behind serving engines."""
