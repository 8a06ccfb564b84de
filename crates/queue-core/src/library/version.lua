-- Tells which library this is.
-- Reply: major, minor and build, separated by dots
return VERSION
