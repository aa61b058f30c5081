"""SAM and its variants, over any torch optimizer. Nothing here imports the rest of the package."""
