"""The proof that an export computes what its run's weights do, which its certificate records."""
