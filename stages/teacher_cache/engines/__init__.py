"""The engines that can run a teacher, one file or folder each, behind one Protocol."""
