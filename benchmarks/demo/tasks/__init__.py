"""One file a task: how its examples are drawn and how an answer is checked."""
