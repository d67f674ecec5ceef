"""Pages and words for people: charts, tables, reports."""
