import os

# Read when torch is loaded. On busy cores two OpenMP threads that spin for each other pre-train twelve times slower.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
