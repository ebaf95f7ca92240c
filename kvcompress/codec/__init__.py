"""Numbers <-> bytes: what is stored of a token, and how attention sees it. Knows no engine."""
