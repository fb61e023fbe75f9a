"""RefTON: reference-assisted person-to-person virtual try-on (arXiv 2511.00956)."""
