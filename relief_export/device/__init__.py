"""Microcontrollers: which there are, what a network takes on one as its compiler measures it, and how it runs there."""
