"""`python -m rlhf_ray` is `rlhf-ray`."""

from rlhf_ray.cli import main

main()
