"""Prompts, training text and preference pairs: from files to checked, tokenised rows, or to the line that is wrong."""
