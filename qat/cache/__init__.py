"""Teacher outputs on disk: what a student is trained to imitate, computed once and used by every run."""
