"""The evolver: a search over the constants of a synapse by CMA-ES, on objectives that small models are trained for.

Populations of small models are trained as one (`stack`). What is searched is `space`, what is measured `objectives`.
"""
