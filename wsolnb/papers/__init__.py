"""The experiments of each paper: their settings, typed, and the stages of their pipelines."""
