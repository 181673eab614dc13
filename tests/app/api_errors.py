"""What the tests expect of an error's answer, whoever gave it."""


def error_of(response, status):
    """The error of an answer with this status, in OpenAI's form."""
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["code"] == status
    return error
