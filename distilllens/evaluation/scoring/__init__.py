"""Answers to numbers, in processes of their own."""
