"""An experiment's cells on many workers at once: what is left to do, Ray's and Slurm's workers, inputs and results by their content."""
