"""The reward model as a service: a Ray Serve application that every family of reward clients can call."""
