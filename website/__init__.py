"""The site of the documents: pages that are generated when it is built, and the check of its links."""
