"""Everything that guesses, and the rules for when to stop guessing.

A drafter lives in the module of its name, whose build(model, settings) makes it; its settings are in settings.py.
"""
