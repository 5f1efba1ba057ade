"""Words for the keys of needles."""

from __future__ import annotations

_ADJECTIVES = """
amber ample arctic bashful bitter brave brisk calm candid clever cosmic crisp curious dapper daring dusty eager
earnest faint fierce fluffy frosty gentle giddy golden grumpy hasty hidden hollow humble icy jolly keen lavish
lively lonely loud lucid mellow merry mighty modest narrow nimble noble odd patient placid polite proud quaint
quick quiet rapid rugged rustic sharp shiny silent sleepy sly smooth solemn spry steep sturdy subtle sunny swift
tame tender tidy tiny vast velvet vivid wary wild witty zesty
"""
_NOUNS = """
acorn anchor anvil apron badger banner barrel basket beacon bellows birch blanket bridge bucket button cabin
candle canyon carpet castle cedar chalk cherry comet copper coral cradle cricket dagger desert drum engine
falcon feather ferry fiddle garden glacier goblet hammer harbor helmet island jacket kettle ladder lantern lemon
lizard magnet marble meadow mirror needle nutmeg oyster paddle parcel pebble pepper pigeon pillow planet puddle
quilt rabbit ribbon rocket saddle salmon shovel spider sponge statue teapot thistle ticket trumpet tunnel turtle
violin walnut whistle willow window wizard
"""
ADJECTIVES, NOUNS = _ADJECTIVES.split(), _NOUNS.split()
