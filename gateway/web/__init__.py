"""The page that the gateway serves at `/`: plain HTML, CSS and ES modules, served unchanged.

Nothing is built and nothing comes from elsewhere: `vendor/` and `fonts/` hold what others wrote, with its licences.
`gateway.api.page` serves them.
"""
