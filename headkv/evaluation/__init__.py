"""Does it work, and what does it cost: tasks, comparisons of methods, and their pictures. Results are plain rows."""
