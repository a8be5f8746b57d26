"""One page of what experiments found, as Markdown or as HTML that needs no other file."""
