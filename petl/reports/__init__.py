"""What a run or a comparison looks like: tables, pages and charts."""
