"""Where the teacher's next-token distributions come from."""
