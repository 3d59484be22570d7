"""npm packages that a test's package-lock.json pins, in a folder that outlives the test."""
import hashlib, os, shutil, subprocess


def install(source, target, files, *flags, timeout=240):
    """Copies package.json, package-lock.json and `files` from `source`, and installs if what is there is of another lock file.
    True: it installed."""
    os.makedirs(target, exist_ok=True)
    digest = hashlib.sha256()
    for name in ("package.json", "package-lock.json", *files):
        shutil.copy(os.path.join(source, name), target)
        if name not in files:
            with open(os.path.join(source, name), "rb") as f:
                digest.update(f.read())
    stamp = os.path.join(target, "installed")
    if os.path.exists(stamp):
        with open(stamp) as f:
            if f.read() == digest.hexdigest():
                return False
    shutil.rmtree(os.path.join(target, "node_modules"), ignore_errors=True)
    result = subprocess.run(["npm", "ci", "--ignore-scripts", "--no-audit", "--no-fund", *flags], cwd=target, capture_output=True, text=True,
                            timeout=timeout)
    if result.returncode != 0:
        raise AssertionError("npm ci: expected the packages of package-lock.json, found:\n" + result.stdout + result.stderr)
    with open(stamp, "w") as f:
        f.write(digest.hexdigest())
    return True
