"""Speed and memory claims, each measured beside a plain reference in the same run."""
