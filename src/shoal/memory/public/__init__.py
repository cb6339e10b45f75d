"""Public sets on which memories are measured, in the formats in which they are published, with their own metrics.

`fever` (claims), `hotpot` (questions over two paragraphs), `locomo` (questions about long conversations), `scoring`
(their metrics). Each reader checks what it reads and names the line that is wrong. The sets come from their publishers.
"""
