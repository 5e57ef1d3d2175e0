"""Language models with saved adapters that write: answers to prompts, and chats."""
