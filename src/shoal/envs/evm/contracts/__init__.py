"""Our own Solidity, what was compiled from it, and the state that quests start from."""
