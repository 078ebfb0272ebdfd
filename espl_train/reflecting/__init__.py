"""Who answers when prompts breed, and all that stands between: budgets, deadlines, recorded replies, the books, a
person's veto. Evolution knows none of it; it has a callable, which is `Client.complete`."""
