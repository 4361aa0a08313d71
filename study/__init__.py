"""The study: the method, its ablations and baselines on the embedded benchmark, measured and told."""
