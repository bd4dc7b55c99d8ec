# Airflow with materialize in it: the versions of requirements.txt and, pinned below, what only the containers need.

FROM python:3.11-slim-bookworm AS build
WORKDIR /build
COPY requirements.txt pyproject.toml README.md LICENSE ./
RUN python -m pip install --no-cache-dir --disable-pip-version-check --root-user-action=ignore \
        --constraint requirements.txt uv hatchling \
    && python -m uv venv --python /usr/local/bin/python /opt/venv
# From the lock only what pyproject.toml asks for without its tools for developers. Then PostgreSQL and Celery, and what these
# two need that the lock does not have. Celery 5.7 has no more what the provider 3.26 imports: its workers would not start.
RUN python -m uv pip install --no-cache --compile-bytecode --python /opt/venv/bin/python \
        --requirement pyproject.toml --extra airflow --extra serve --constraint requirements.txt \
        apache-airflow-providers-celery==3.26.0 \
        apache-airflow-providers-postgres==7.1.1 \
        amqp==5.4.2 \
        asyncpg==0.32.0 \
        billiard==4.3.2 \
        celery==5.6.3 \
        click-didyoumean==0.3.1 \
        click-plugins==1.1.1.2 \
        click-repl==0.4.1 \
        flower==2.2.0 \
        humanize==4.17.0 \
        kombu==5.7.0 \
        prompt-toolkit==3.0.53 \
        psycopg==3.3.9 \
        psycopg-binary==3.3.9 \
        psycopg2-binary==2.9.13 \
        pytz==2026.6 \
        tornado==6.6.1 \
        tzlocal==5.4.5 \
        vine==5.1.0 \
        wcwidth==0.9.4
COPY materialize ./materialize
RUN python -m pip wheel --no-cache-dir --disable-pip-version-check --no-deps --no-build-isolation --wheel-dir /wheel . \
    && python -m uv pip install --no-cache --compile-bytecode --no-deps --python /opt/venv/bin/python /wheel/*.whl

FROM python:3.11-slim-bookworm
# The number is Airflow's usual one. A new volume takes over owner and mode of the folder that it covers.
RUN groupadd --gid 50000 airflow \
    && useradd --uid 50000 --gid 50000 --create-home --shell /usr/sbin/nologin airflow \
    && install --directory --owner=airflow --group=airflow --mode=0700 /opt/airflow /opt/airflow/auth /opt/airflow/logs \
    && install --directory --mode=0755 /opt/materialize /opt/materialize/lake
COPY --from=build /opt/venv /opt/venv
ENV AIRFLOW_HOME=/opt/airflow \
    MATERIALIZE_CONFIG=/opt/materialize/config \
    PATH=/opt/venv/bin:$PATH \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1
WORKDIR /opt/airflow
USER 50000:50000
CMD ["airflow", "version"]
