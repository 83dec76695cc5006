"""The reward model itself: network, card, text to tokens, and the scorers, here and behind a service."""
