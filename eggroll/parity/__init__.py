"""`python -m eggroll.parity`: the proof, on your machine, that the backends compute the same numbers.

The array-API core, run on NumPy, is the definition; each backend that is installed is compared with it, with recorded
vectors (``--vectors``), or with a HyperscaleES checkout (``--reference``). See docs/parity.md.
"""
