"""The drafters by name; each is imported only when it is built."""

NAMES = ("plain", "kangaroo")
