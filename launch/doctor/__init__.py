"""Whether a run can start on some machines: `python -m launch.doctor`."""
