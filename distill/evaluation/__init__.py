"""What a student is worth: its text against references, its distribution against the teacher's."""
