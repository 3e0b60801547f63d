"""`python -m jobs` is `raydiffusion`."""

from jobs.entry import main

main()
