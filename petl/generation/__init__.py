"""Everything that answers: prediction, chat, serving."""
