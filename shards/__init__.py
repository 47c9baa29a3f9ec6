"""The contract between the stages: teacher signals on disk. Numpy, pyarrow and zstandard; never torch."""
