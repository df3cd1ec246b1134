"""The forms that rows are written in: which keys make a conversation, and which a text without a chat template."""
