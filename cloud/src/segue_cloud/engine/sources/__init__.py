"""Where weights come from: each module reads one kind of source into a `Checkpoint`."""
