"""Pages for people: one to label clips, one to compare two generators, and one that shows a run."""
