"""Everything that guesses, and the rules for when to stop guessing."""

NAMES = ("plain", "kangaroo")
