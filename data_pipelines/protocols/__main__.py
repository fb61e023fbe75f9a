"""`python -m data_pipelines.protocols`: the table of published protocols, as Markdown."""

from __future__ import annotations

from data_pipelines.protocols.published import table

if __name__ == "__main__":
    print(table())
