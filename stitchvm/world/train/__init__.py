"""Trainings of every network of the embedded world."""
