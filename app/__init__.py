"""The Ray Serve application; everything that imports Ray, Starlette or pydantic lives here."""
