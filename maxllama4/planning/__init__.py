"""What a run needs and how fast it goes, before there is a machine: compiled for a described one, and by arithmetic."""
