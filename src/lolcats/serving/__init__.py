"""Text for many prompts at once."""
