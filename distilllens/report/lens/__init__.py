"""The lens report: what every layer of teacher and student would say."""
